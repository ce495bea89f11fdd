"""What users see of runs and data: pages, charts, the watch page."""
