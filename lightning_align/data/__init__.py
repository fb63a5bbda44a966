"""Records, templates, encoding, packing and the datamodules."""
