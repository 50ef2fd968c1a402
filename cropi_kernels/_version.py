"""The one place that holds the version: the build reads it from here, and so do both packages."""

__version__ = "0.1.0"
