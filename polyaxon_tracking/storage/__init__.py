"""Where bytes go: directories on disk and in object stores."""
