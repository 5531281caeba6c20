"""LENA inside other libraries. Nothing here is imported before the library itself."""
