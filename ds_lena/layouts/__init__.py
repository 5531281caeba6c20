"""Where memory is: this rank's pieces of each parameter, and the averaged gradient of each piece."""
