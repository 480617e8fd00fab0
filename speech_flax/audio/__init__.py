"""From bytes to waveforms to model inputs."""
