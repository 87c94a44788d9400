"""The machines that plans are made for. A kind of machine is a folder here, and ``registry.py`` lists the kinds."""
