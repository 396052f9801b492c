"""Models, adapters and manifests on disk, read and written whole or not at all."""
