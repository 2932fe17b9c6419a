"""Export: images and pairs to webdataset tars and to img2dataset's layouts."""
