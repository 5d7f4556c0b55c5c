"""Which samples are worth training on: a visible list of filters, each answering keep or a counted reason."""
