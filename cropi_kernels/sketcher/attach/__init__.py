"""Which tap each module of a model gets, and how the taps come on and off."""
