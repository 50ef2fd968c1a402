"""From sketches to a choice: influence scores, selection, and the tables and plots of both."""
