"""The version, alone in a file so that the build reads it without importing anything else."""

VERSION = "0.1.0"
