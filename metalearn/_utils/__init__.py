"""Small tools that every folder uses: pytrees, and checks of arguments."""
