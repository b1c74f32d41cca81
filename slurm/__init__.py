"""Jobs and their state: scripts, submission, records, private clusters. Its one name is `megabatch.slurm`."""

if __name__ != "megabatch.slurm":
    raise ImportError(
        f"import megabatch.{__name__}…: as {__name__}… it would be a second copy of every class", name=__name__
    )
