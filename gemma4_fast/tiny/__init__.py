"""A small trained checkpoint of the Gemma 4 26B-A4B architecture, in the published file layout."""
