"""The pixels of a sample: decoded, cut into views, coloured."""
