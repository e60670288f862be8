package main

// The features of looking after CheckpointStores.
var stores = []mutant{
	{"a full store takes more", "internal/admission/quota.go",
		`store.Status.StoredBytes >= most.Value()`, `store.Status.StoredBytes < 0`,
		unit, "internal/admission", "TestAStoreWithoutAPlaceSaysWhichHowFullAndWhatToDo"},
	{"a namespace beyond its share of a store", "internal/admission/quota.go",
		`of.Name == namespace && of.StoredBytes`, `of.Name == "" && of.StoredBytes`,
		control, "test/control", "TestACheckpointThatItsStoreHasNoPlaceForIsRefused"},
	{"no finalizer of a store", "internal/admission/quota.go",
		`	case len(checkpoint.Finalizers) == 0:
`, `	case checkpoint.Name != "":
	case len(checkpoint.Finalizers) == 0:
`,
		control, "test/control", "TestADeletedCheckpointIsRemovedFromItsStoreFirst"},
	{"orphans of other clusters deleted", "internal/controller/storeorphans.go",
		`c.Labels[checkpointv1alpha1.StoreLabelCluster] != cluster || `, `cluster == "" || `,
		unit, "internal/controller", "TestOnlyThisClustersOrphansAreDeletedAndOnlyAfterAnHour"},
	{"orphans deleted at once", "internal/controller/storeorphans.go",
		`		if now.Sub(k.orphans[id]) < orphanAge || now.Sub(c.Created) < orphanAge {`, `		if now.IsZero() {`,
		unit, "internal/controller", "TestOnlyThisClustersOrphansAreDeletedAndOnlyAfterAnHour"},
	{"checkpoints that failed kept in their store", "internal/controller/storeorphans.go",
		`		return !owner.IsReady()`, `		return false`,
		unit, "internal/controller", "TestOnlyThisClustersOrphansAreDeletedAndOnlyAfterAnHour"},
	{"retention of what Pods are restored from", "internal/controller/retention.go",
		`return !restored(pod) })`, `return pod == nil })`,
		unit, "internal/controller", "TestRetentionDeletesWhatItSaysButNeverWhatIsUsedOrNotReady"},
	{"retention of what is not Ready", "internal/controller/retention.go",
		`c.DeletionTimestamp == nil && c.IsReady() {`, `c.DeletionTimestamp == nil {`,
		unit, "internal/controller", "TestRetentionDeletesWhatItSaysButNeverWhatIsUsedOrNotReady"},
	{"the controller deletes any PodCheckpoint", "config/admission/policies.yaml",
		`      has(oldObject.status) && has(oldObject.status.store) && has(oldObject.status.conditions) &&
      oldObject.status.conditions.exists(c, c.type == 'Ready' && c.status == 'True')
    message: stasis-controller deletes`, `      true
    message: stasis-controller deletes`,
		control, "test/control", "TestRetentionDeletesWithTheRightsOfTheController"},
	{"another store taken for the one that was there", "internal/stores/stores.go",
		`object.Status.StoreID != "" && s.ID() != object.Status.StoreID`, `object.Status.StoreID == "x"`,
		unit, "internal/stores", "TestAnotherStoreAtThePlaceIsRefused"},
	{"a store made anew where one was", "internal/stores/stores.go",
		`	if id := object.Status.StoreID; id != "" {`, `	if id := object.Status.StoreID; id == "x" {`,
		unit, "internal/controller", "TestAStoreThatWasReplacedIsNotUsedNorMadeAgain"},
	{"a checkpoint leaves its store while it is restored", "internal/controller/storerelease.go",
		`	if len(users) > 0 {`, `	if false {`,
		unit, "internal/controller", "TestACheckpointStaysInItsStoreWhilePodsAreRestoredFromIt"},
	{"a store that is away forgotten at a deletion", "internal/controller/storerelease.go",
		`		return deleteAgain, nil`, `		return 0, nil`,
		unit, "internal/controller", "TestAStoreThatIsAwayDelaysADeletionAndSaysWhy"},
	{"a store that is gone waited for", "internal/controller/storerelease.go",
		`	if object == nil || object.DeletionTimestamp != nil {
`, `	if object == nil || object.DeletionTimestamp != nil {
		return deleteAgain, nil
`,
		unit, "internal/controller", "TestACheckpointWhoseStoreIsGoneIsLetGoAndWhatStaysIsNamed"},
	{"keys never rotated", "internal/controller/stores.go",
		`	rotated, err := r.config.Open.Rotate(opening, object, s)`, `	rotated, err := false, error(nil)`,
		unit, "internal/controller", "TestKeysAreRotatedWhenTheSecretHasALaterOne"},
	{"secrets listed by agents", "config/rbac/agent.yaml",
		`  resources: [secrets]
  verbs: [get]`, `  resources: [secrets]
  verbs: [get, list]`,
		control, "test/control", "TestEveryVerbOfEverySubjectIsAsTheTableOfRightsSays"},
	{"what is shared with the checkpoint before not looked for", "internal/store/put.go",
		`	if of.previous.has(int(at.block)) {`, `	if false {`,
		unit, "internal/store", "TestACheckpointSaysWhatItSharesWithTheOneBefore"},
	{"what an interrupted attempt wrote shared with others", "internal/store/put.go",
		`	if of.own {`, `	if false {`,
		unit, "internal/store", "TestAnInterruptedWriterCostsOnlyWhatItDidNotFinish"},
	{"another cluster's checkpoint named as this one's", "internal/agent/storing.go",
		`before.Labels[v1alpha1.StoreLabelCluster] == stored.Labels[v1alpha1.StoreLabelCluster] && `, ``,
		unit, "internal/agent", "TestACheckpointThatWasSharedWithIsNamedOnlyIfItIsOfThisCluster"},
	{"a verification begun again for each who asks", "internal/stores/runner.go",
		`	if n := r.runs[key]; n != nil {`, `	if n := r.runs[key]; n != nil && n.err != nil {`,
		unit, "internal/stores", "TestAVerificationGoesOnWhileNobodyWaitsAndIsFoundAgain"},
}
