"""What `ray job submit -- python jobs/<file>.py` runs; the only code that talks to MLflow."""
