"""The sections of a job's batch script, one module each; `megabatch.slurm.render` puts them together."""
