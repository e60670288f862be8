package network

import (
	"net"
	"net/netip"
	"testing"
)

func TestOnlyIPv4NetworksOfTheMachineCount(t *testing.T) {
	_, v4, _ := net.ParseCIDR("10.89.3.0/24")
	_, v6, _ := net.ParseCIDR("fd00::/8")
	if p, ok := prefix(v4); !ok || p != netip.MustParsePrefix("10.89.3.0/24") {
		t.Errorf("%v, %v", p, ok)
	}
	for _, n := range []*net.IPNet{nil, v6} {
		if p, ok := prefix(n); ok {
			t.Errorf("%v became %v", n, p)
		}
	}
}

func TestAnOverlapInEitherDirectionCounts(t *testing.T) {
	taken := []netip.Prefix{netip.MustParsePrefix("10.89.3.128/25"), netip.MustParsePrefix("172.16.0.0/12")}
	for p, want := range map[string]bool{"10.89.3.0/24": true, "10.89.4.0/24": false, "172.20.0.0/16": true} {
		if got := overlaps(taken, netip.MustParsePrefix(p)); got != want {
			t.Errorf("%s: %v", p, got)
		}
	}
}
