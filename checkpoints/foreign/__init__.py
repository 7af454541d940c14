"""Weights of other libraries: reading their folders, judging their settings, and comparing what they compute."""
