"""Data sets: sources, splits and normalisation.

`image_reading` needs only numpy and Pillow, because Ray's decoding tasks import it in every process.
"""
