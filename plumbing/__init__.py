"""What every run needs and no paper is about: ranks, checkpoints, files, the run, figures."""
