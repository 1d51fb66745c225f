"""Ray Data and Ray Train: datasets in, datasets and trained policies out."""

import os

# OpenCV reads it when it is loaded. By itself it takes gigabytes for what a damaged header declares.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26))
