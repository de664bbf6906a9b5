"""This project beside diffusers 0.42: equal weights, equal shapes, in turns. See `__main__`."""
