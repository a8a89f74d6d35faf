"""Workers that are not trusted: the modes, sealed layers, pads made ahead, and what is told of it."""
