"""What setup.py and `make cuda` share; not a part of the installed package."""
