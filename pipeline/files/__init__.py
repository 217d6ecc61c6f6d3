"""Files: atomic writing, URLs, downloads, globs."""
