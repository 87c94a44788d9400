from hypothesis import settings

# Tests assert no timings, hypothesis's own limit of 200 ms an example included.
settings.register_profile("llmir", deadline=None)
settings.load_profile("llmir")
