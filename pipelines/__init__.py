"""Ray Data and Ray Train: datasets in, datasets and trained policies out."""
