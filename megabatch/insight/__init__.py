"""What the files of runs tell: progress, goodput, why they failed, how they differ, a page about them."""
