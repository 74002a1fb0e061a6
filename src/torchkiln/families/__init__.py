"""The catalogue of parametrizations, grouped by the mathematics they share."""
