"""A float network and calibration images → the same network in integers of eight bits."""
