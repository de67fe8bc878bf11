"""The files of a training run, how it resumes, and what stops it."""
