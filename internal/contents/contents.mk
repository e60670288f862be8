# What the tests and the documentation of checkpoints' contents show is of a real
# checkpoint: of test/cri/specimen, on a node.

.PHONY: specimen screenshot

# Not in the checkout, whose path would be in what is captured.
SPECIMEN_STATE = /var/tmp/stasis-specimen
SPECIMEN_TEST = TestWhatACheckpointHoldsIsReadBackFromItsImages

specimen: deps bin/devcluster image-files ## capture what internal/contents is tested with anew
	STASIS_CRI_STATE=$(SPECIMEN_STATE) STASIS_KEEP_SPECIMEN=$(CURDIR)/internal/contents/testdata/specimen.zip \
		go test -count=1 ./test/cri -run $(SPECIMEN_TEST)
	rm -r $(SPECIMEN_STATE)
	go test -count=1 ./internal/contents -run TestASpecimenIsReadAsItWas -update

screenshot: deps bin/devcluster image-files ## take the picture in docs/images anew
	STASIS_CRI_STATE=$(SPECIMEN_STATE) STASIS_KEEP_PAGE=$(CURDIR)/dist/inspect.html \
		go test -count=1 ./test/cri -run $(SPECIMEN_TEST)
	rm -r $(SPECIMEN_STATE)
	hack/screenshot.sh dist/inspect.html docs/images/inspect.png
