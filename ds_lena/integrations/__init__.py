"""Where LENA meets other libraries. Nothing here is imported before the library itself is."""
