"""What the operating system must do whole: files that are replaced, processes that are forked."""
