"""Images and labels, from files in their published layouts."""
