"""What lies on disk: models, adapters and manifests, read and written whole or not at all."""
