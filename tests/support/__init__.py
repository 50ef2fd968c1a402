"""Models, data and runs that the tests share."""
