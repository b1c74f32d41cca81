"""One launch: a recipe planned, judged, written, and submitted or run here."""
