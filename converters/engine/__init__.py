"""Plans as data, and what executes, commits, resumes and verifies them; no family, no format of a checkpoint."""
