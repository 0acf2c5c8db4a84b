"""The small trained text-to-audio pipeline that ships with the package (see its model card)."""
