"""Where memory is: this rank's pieces of each parameter, and their averaged gradient."""
