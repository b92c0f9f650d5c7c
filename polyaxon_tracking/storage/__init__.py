"""Storage for checkpoints and other files: directories on disk and in object stores."""
