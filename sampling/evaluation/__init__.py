"""An evaluation of a model, from its settings to its record and page."""
