"""Every notebook is run; the first one in a real browser too."""
