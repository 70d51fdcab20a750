"""`ray-ddpm evaluate`: judges samples of models and of other programs by the yardsticks of sweeps."""
