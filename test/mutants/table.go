package main

// The features, each with the test that is named for it. The list grows with
// every piece of work.
var mutants = []mutant{
	// The main job.
	{"plain runc instead of stasis-runtime", "internal/ociruntime/bundle.go",
		`	return b.annotations[nodeapi.AnnotationPrefix+"restore-from"] != "" ||
		b.annotations[nodeapi.AnnotationPrefix+"restore-ticket"] != ""`, `	return false`,
		node, "test/cri", "TestARestoredPodContinuesWhereItsSourceWasCaptured"},
	{"no freeze", "internal/engine/criu/checkpoint.go",
		`if _, err := e.runtimeCapturing(ctx, entry.SandboxID, t.Runtime, "pause", t.ID); err != nil {`, `if err := ctx.Err(); err != nil {`,
		node, "test/cri", "TestAllContainersAreCapturedAtOneMoment"},
	{"containers frozen and captured one by one", "internal/engine/criu/checkpoint.go",
		`	out, err := e.runtimeCapturing(ctx, sandboxID, t.Runtime, "checkpoint",`,
		`	if _, err := e.runtime(ctx, t.Runtime, "resume", t.ID); err != nil {
		return err
	}
	time.Sleep(time.Duration(1+t.Name[0]%2) * 50 * time.Millisecond)
	if _, err := e.runtime(ctx, t.Runtime, "pause", t.ID); err != nil {
		return err
	}
	out, err := e.runtimeCapturing(ctx, sandboxID, t.Runtime, "checkpoint",`,
		node, "test/cri", "TestAllContainersAreCapturedAtOneMoment"},
	{"restored containers not held before their start", "internal/engine/criu/freezehook.go",
		`	return f, f.freeze()`, `	return f, nil`,
		node, "test/cri", "TestARestoredContainerIsCreatedAndHasNotRunUntilItIsStarted"},
	{"writable layer not restored", "internal/ociruntime/ociruntime.go",
		`	if from.RootfsArchive != "" {`, `	if false {`,
		node, "test/cri", "TestTheWritableLayerComesBack"},
	{"volumes not filled", "internal/ociruntime/ociruntime.go",
		`	for _, v := range from.Volumes {`, `	for _, v := range from.Volumes[:0] {`,
		node, "test/cri", "TestAllContainersAreCapturedAtOneMoment"},
	{"the source's host name kept", "internal/engine/criu/restore.go",
		`	if err == nil && hostname != "" {`, `	if false {`,
		node, "test/cri", "TestARestoredPodContinuesWhereItsSourceWasCaptured"},
	{"a restored container restored again when it restarts", "internal/restoring/sessions.go",
		`	case rec.Ordinary, slices.Contains(rec.Started, in.Container):`, `	case rec.Ordinary:`,
		node, "test/cri", "TestAContainerStartedAgainAfterItsRestoreIsAnOrdinaryStart"},
	{"established TCP connections not closed at restore", "internal/engine/criu/restore.go",
		`+"\ntcp-close\n"`, `+"\n"`,
		node, "test/cri", "TestAContainerWithTCPConnectionsIsCapturedAndItsListenerComesBack"},

	// Never a frozen Pod, nothing half done.
	{"CPU limits not lifted for the freeze", "internal/engine/criu/checkpoint.go",
		`			errs = append(errs, q.lift())`, `			errs = append(errs, nil)
			_ = q`,
		node, "test/cri", "TestABusyContainerUnderACPULimitFreezesAndHasItsLimitBackAfter"},
	{"CPU limits not put back", "internal/engine/criu/checkpoint.go",
		`			errs = append(errs, q.putBack())`, `			errs = append(errs, nil)
			_ = q`,
		node, "test/cri", "TestABusyContainerUnderACPULimitFreezesAndHasItsLimitBackAfter"},
	{"no thaw after an error", "internal/engine/criu/checkpoint.go",
		`			err = errors.Join(err, endCapture(thawCtx, sandboxID))`, `			return`,
		node, "test/cri", "TestCheckpointPodThatOutlastsItsDeadlineThawsThePodAndLeavesAnEmptyDirectory"},
	{"no thaw by the guard", "internal/engine/criu/guard.go",
		`	return e.thawAll(ctx, entries)`, `	_ = entries
	return nil`,
		node, "test/cri", "TestAPodWhoseAgentIsKilledInTheFreezeWindowRunsOn"},
	{"a guard that dies with the agent's log", "internal/engine/criu/guard.go",
		`	signal.Ignore(unix.SIGPIPE)`, `	signal.Reset(unix.SIGPIPE)`,
		node, "test/cri", "TestAGuardThatCannotLogThawsAllTheSame"},
	{"no thaw at the next agent's start", "internal/agent/daemon.go",
		`	if err := d.engine.ThawLeftovers(ctx); err != nil {`, `	if err := ctx.Err(); err != nil {`,
		node, "test/cri", "TestAPodThatNobodyThawedIsThawedByTheNextAgent"},
	{"a capture that outlives its agent not ended", "internal/engine/criu/criu.go",
		`	return errors.Join(endCapture(ctx, entry.SandboxID), e.thaw(ctx, entry))`, `	return e.thaw(ctx, entry)`,
		node, "test/cri", "TestAPodWhoseAgentIsKilledInTheFreezeWindowRunsOn"},
	{"an agent that goes on without its guard", "internal/agent/daemon.go",
		`			cancel(errGuardEnded)`, `			d.Log.Warn("no guard")`,
		node, "test/cri", "TestAnAgentThatLosesItsGuardEnds"},
	{"partial files kept after an error", "internal/criservice/checkpoint.go",
		`s.host.Do(func() error { return clear(in.OutputPath) })`, `error(nil)`,
		node, "test/cri", "TestCheckpointPodThatOutlastsItsDeadlineThawsThePodAndLeavesAnEmptyDirectory"},
	{"stopped processes not looked for", "internal/engine/criu/inspect.go",
		`strings.HasPrefix(strings.TrimSpace(state), "T")`, `strings.HasPrefix(strings.TrimSpace(state), "no such state")`,
		node, "test/cri", "TestAStoppedProcessIsRefusedBeforeTheFreezeAndNamed"},
	{"a failed restore not undone", "internal/criservice/restore.go",
		`			err = errors.Join(err, s.undo(ctx, sandbox.PodSandboxId))`, `			err = errors.Join(err, ctx.Err())`,
		node, "test/cri", "TestRestorePodThatFailsHalfWayRemovesWhatItMade"},
	{"an interrupted checkpoint not ended", "internal/agent/reconciler.go",
		`	case inProgress(&pcp):
		return ctrl.Result{}, r.interrupted(ctx, &pcp)`, `	case inProgress(&pcp):
		return ctrl.Result{}, nil`,
		unit, "internal/agent", "TestACrashBeforeTheRecordEndsAsInterrupted"},

	// Data.
	{"no digest check", "internal/checkpoint/directory.go",
		`	if digest != want.Digest {`, `	if false {`,
		node, "test/cri", "TestRestorePodRefusesDataThatWereAlteredOrRemovedAndNamesTheFile"},
	{"no check of the manifest's digest", "internal/checkpoint/directory.go",
		`	if digest != "" && manifestDigest != "" && digest != manifestDigest {`, `	if false {`,
		unit, "internal/checkpoint", "TestAnotherManifestIsRefusedBeforeItIsBelieved"},
	{"no look for files that are not listed", "internal/checkpoint/directory.go",
		`	return m, verifyNothingElse(root, m)`, `	return m, nil`,
		unit, "internal/checkpoint", "TestAnyChangeIsFoundAndNamed"},
	{"names in manifests not checked", "internal/checkpoint/directory.go",
		`		if !cleanPath(f.Path) || f.Path == ManifestName || files[f.Path] {`, `		if false {`,
		unit, "internal/checkpoint", "TestManifestsWithNamesThatLeadElsewhereAreRefused"},

	// Who may, and what.
	{"no template comparison at admission", "internal/admission/authorize.go",
		`	return podtemplate.Compare(checkpoint.Status.CheckpointedPodTemplate, pod)`, `	_ = podtemplate.Compare
	return nil`,
		control, "test/control", "TestAPodThatDiffersFromTheCheckpointIsInvalid"},
	{"resizes and ephemeral containers while a Pod is checkpointed", "config/admission/policies.yaml",
		`  - expression: "false"
    messageExpression: >-
      'a Pod that is being checkpointed`, `  - expression: "true"
    messageExpression: >-
      'a Pod that is being checkpointed`,
		control, "test/control", "TestAPodThatIsBeingCheckpointedTakesNoEphemeralContainerAndIsNotResized"},
	{"agents write to any node's objects", "config/admission/policies.yaml",
		`  - expression: has(oldObject.spec.nodeName) && oldObject.spec.nodeName == variables.node`, `  - expression: "true"`,
		control, "test/control", "TestWhatComesOfRequestsIsAsTheTableOfRequestsSays"},
	{"nodes/proxy for agents", "config/rbac/agent.yaml",
		`  resources: [pods/status]
  verbs: [update, patch]`, `  resources: [pods/status, nodes/proxy]
  verbs: [get, update, patch]`,
		control, "test/control", "TestEveryVerbOfEverySubjectIsAsTheTableOfRightsSays"},
	{"restoring without the verb", "internal/admission/authorize.go",
		`	if !allowed {`, `	if !allowed && a.log == nil {`,
		control, "test/control", "TestNoWorkloadControllerRestoresUntilSomebodyGrantsIt"},
	{"the opt-in of namespaces", "config/opt-in/policy.yaml",
		`.orValue('') == 'true'`, `.orValue('true') == 'true' || true`,
		control, "test/control", "TestWithTheOptInOnlyLabelledNamespacesHaveCheckpoints"},
	{"no template comparison on the node", "internal/agent/resolver.go",
		`podtemplate.Compare(pcp.Status.CheckpointedPodTemplate, pod); len(differences) > 0`, `podtemplate.Compare(pcp.Status.CheckpointedPodTemplate, pod); false`,
		unit, "internal/agent", "TestEveryRefusalOfARestoreHasReasonAndMessage"},
	{"the checkpoint's UID not pinned on the node", "internal/agent/resolver.go",
		`	case string(pcp.UID) != pin:`, `	case false:
		_ = pin`,
		unit, "internal/agent", "TestEveryRefusalOfARestoreHasReasonAndMessage"},
	{"a ticket that works twice", "internal/restoring/sessions.go",
		`		dir, ok := s.tickets[ticket]
		delete(s.tickets, ticket)`, `		dir, ok := s.tickets[ticket]`,
		unit, "internal/restoring", "TestATicketWorksOnceAndForItsDirectory"},
	{"engine annotations of users passed on", "internal/ociruntime/bundle.go",
		`			delete(b.annotations, name)
			changed = true`, `			changed = true`,
		unit, "internal/ociruntime", "TestAnnotationsThatReachTheEngineAreDroppedFromEveryPod"},
	{"archives that lead out of the tree", "internal/layer/layer.go",
		`	if !fs.ValidPath(name) {
		return "", errors.New("the name leads out of the tree")
	}
	return filepath.FromSlash(name), nil`, `	return strings.TrimLeft(strings.ReplaceAll(name, "..", "dotdot"), "/"), nil`,
		unit, "internal/layer", "TestHostileArchivesDoNotReachOutOfTheTree"},
	{"a deadline not required", "internal/criservice/service.go",
		`	if _, ok := ctx.Deadline(); !ok {`, `	if false {`,
		node, "test/cri", "TestCheckpointPodRequiresADeadline"},
	{"restores not authorised", "internal/admission/authorize.go",
		`	if !allowed {`, `	if !allowed && req.Namespace == "" {`,
		control, "test/control", "TestOnlyWhoMayRestoreACheckpointCreatesAPodFromIt"},
	{"the restore annotation open to be added later", "config/admission/policies.yaml",
		`variables.now[?'checkpoint.podstasis.dev/restore-from'] == variables.before[?'checkpoint.podstasis.dev/restore-from']`, `true`,
		control, "test/control", "TestTheRestoreAnnotationsStayAsTheyWereAtCreation"},
	{"placement that conflicts let through", "internal/admission/authorize.go",
		`	if conflict := placement.Conflict(pod, checkpoint.Status.NodeName, node); conflict != "" {`,
		`	if conflict := placement.Conflict(pod, checkpoint.Status.NodeName, node); conflict == "none" {`,
		control, "test/control", "TestPlacementThatConflictsIsForbidden"},

	// What only a whole cluster shows.
	{"the source's other UID ignored", "internal/agent/precondition.go",
		`if want := pcp.Spec.SourcePodUID; want != nil && *want != "" && pod.UID != *want {`,
		`if want := pcp.Spec.SourcePodUID; want != nil && *want == "" && pod.UID != *want {`,
		cluster, "test/e2e", "TestAReplacedSourcePodIsNotTouched"},
	{"a connection that nobody accepted fails the checkpoint", "internal/engine/criu/checkpoint.go",
		`"--tcp-skip-in-flight", `, ``,
		cluster, "test/e2e", "TestProcessesComeBackWithTheirThreadsFilesPipesAndChildren"},

	// What users see.
	{"restored containers let go one by one", "internal/ociruntime/ociruntime.go",
		`	if sandbox == nil || !slices.Contains(sandbox.Together, m.Container) {`, `	if sandbox == nil || slices.Contains(sandbox.Together, m.Container) {`,
		unit, "internal/ociruntime", "TestContainersThatGoTogetherAreLetGoAtTheStartOfTheLastOfThem"},
	{"containers that the kubelet waits for held back with the others", "internal/agent/resolver.go",
		`		if restartable(&c) && c.StartupProbe == nil && !hasPostStart(&c) {`, `		if restartable(&c) {`,
		unit, "internal/agent", "TestContainersGoTogetherUnlessTheKubeletWaitsForOneOfThem"},
	{"kubectl restore waits on when the node refuses", "internal/kubectl/restore.go",
		`		if slices.Contains(refusals, reason) {`, `		if false {`,
		unit, "internal/kubectl", "TestRestoreThatTheNodeRefusesExits1WithTheReason"},
	{"kubectl restore takes a fresh start for a restore", "internal/kubectl/restore.go",
		`		if status.RestartCount > 0 {`, `		if false {`,
		unit, "internal/kubectl", "TestRestoreThatStartedAnewInsteadOfContinuingExits1"},
	{"kubectl restore leaves the Pod to its workload's controller", "internal/kubectl/pod.go",
		`	for _, label := range workloadLabels {`, `	for _, label := range workloadLabels[:0] {`,
		unit, "internal/kubectl", "TestRestoreCreatesThePodOfTheTemplateAndWaitsUntilItIsReady"},
	{"kubectl checkpoint does not pin the Pod", "internal/kubectl/checkpoint.go",
		`	checkpoint.Spec.SourcePodUID = &uid`, `	_ = uid`,
		unit, "internal/kubectl", "TestCheckpointWaitsAndSaysNodeLocationSizeAndFreezeTime"},
	{"the demo takes any later count for a continuation", "demo/counters/counters.go",
		`	if stood < window.Frozen*8/10 {`, `	if false {`,
		unit, "demo/counters", "TestARestoredPodContinuesOnlyWhereItsSourceStoodStill"},
}
