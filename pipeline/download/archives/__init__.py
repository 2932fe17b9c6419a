"""Images that are there already: webdataset tars and img2dataset's output."""
