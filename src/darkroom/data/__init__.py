"""From a source of images to packed, checked arrays."""
