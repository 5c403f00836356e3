"""Guards: packed documents stay isolated, steps that are not finite change no weight, loss spikes are reported."""
