"""The course around the package: shipped adapters, running the lessons, predictions."""
