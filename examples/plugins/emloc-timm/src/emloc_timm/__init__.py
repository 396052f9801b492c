"""EMLoC for the image classifiers of timm."""
